"""The checks of the contract, by theme. Each is a free function `check_xxx(case)`."""
