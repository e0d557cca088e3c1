"""Step distillation: the roles, the recipes, the trainer and the run of `vivace distill`."""
