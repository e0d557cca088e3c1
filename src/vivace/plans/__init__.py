"""Plans and sessions: what is to be done, and doing it."""
