"""Training of parts that the techniques use: recipes that run on a processor or on GPUs, and can be taken up again."""
