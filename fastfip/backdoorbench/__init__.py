"""BackdoorBench in and out: `attack_result.pt` read without running a pickle, `defense_result.pt`, the leaderboard."""

from fastfip.backdoorbench.leaderboard import leaderboard_rows, write_leaderboard
from fastfip.backdoorbench.result import AttackResult, find, read, write_defense_result
from fastfip.backdoorbench.settings import NORMALISATION

__all__ = [
    "NORMALISATION",
    "AttackResult",
    "find",
    "leaderboard_rows",
    "read",
    "write_defense_result",
    "write_leaderboard",
]
