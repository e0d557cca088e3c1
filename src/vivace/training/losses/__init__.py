"""Objectives of step distillation for flow-matching video models: pure functions of tensors and callables.

Conventions of every file here:

- Paths are straight: `x_s = (1 - s) x_0 + s n`, data at s = 0 and noise at s = 1, so that the velocity is `n - x_0`
  and an estimate of the data is `x_s - s v`. Samplers step from high s to low s.
- `Velocity`: (x (B, ...), s (B,)) -> v (B, ...). Captions, guidance and the kind of network are closed over.
- `FlowMap`: (x (B, ...), s (B,), r (B,)) -> the mean velocity u between s and r, so that `x_r = x_s - (s - r) u`.
- A loss is a scalar in float32, alone or beside a dict of detached diagnostics. Differences are taken in float32,
  whatever type the network returns: under bf16 autocast the difference of two near predictions is mostly rounding.
- What teaches (teachers, critics in a student's loss, EMA students, targets) is called without gradient. A judge in a
  generator's loss must pass gradient to the sample: freeze its parameters before, as one does with discriminators.
- `weight` broadcasts to x and is divided by its mean, so that a mask changes where a loss looks and not its size.

| file | what is learned |
|---|---|
| `paths` | nothing: points, steps, times, weighted means, flow matching itself |
| `progressive` | two steps of a teacher in one; guidance without its second call |
| `rectified` | the straight line between a teacher's noise and its clip, whole (reflow) or in windows (PeRFlow) |
| `consistency` | the same end from neighbouring points of a trajectory: LCM, PCM, DCM |
| `continuous` | the same with neighbours infinitely near: sCM, rCM |
| `derivative` | nothing: how a network changes along a trajectory, for the two files around it |
| `flow_map` | the mean velocity between any two times: MeanFlow, composed maps |
| `distribution` | the teacher's distribution instead of its trajectories: DMD2, TDM, Phased DMD, rewarded DMD |
| `adversarial` | what a discriminator cannot tell apart: hinge, non-saturating, relativistic, penalties, features |
| `motion` | not a method: weights of what moves, and differences between frames |
"""
