"""Calibration: what was measured of one model's exact run, kept in one file, and what can be solved from it.

`artifact` is the file and its key, `gram` the error algebra of the trajectory, `schedule` chooses computed steps,
`solve` turns a wanted share of skipped steps into a threshold. `vivace.plans.calibrating` makes the file.
"""
