"""Public contract checks: run them on a technique, adapter or kernel of your own."""
