"""The embedded text-to-video pipeline: diffusers classes, weights trained on `vivace.world`, and their trainer.

Import what you need from the modules: `defaults` (call arguments, no torch), `load.load_tiny`, `build.build_pipeline`,
`whole_clip` (fast exact VAE passes). `python -m vivace.tiny.train` trains, evaluates and exports the weights.
"""
