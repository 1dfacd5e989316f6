"""Tagged reasoning chains and preference pairs, made by a teacher, a judge and a tagger (SPEC S5-S16)."""
