"""What chance explains nineteen times in twenty, where there are few samples."""

# Two-sided 95 % of Student's t, by degrees of freedom.
_T_95 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
    10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000,
}  # fmt: skip


def t_95(degrees: int) -> float:
    """How many standard errors; never fewer than there should be."""
    return _T_95[max(known for known in _T_95 if known <= degrees)]
