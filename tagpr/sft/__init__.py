"""Supervised fine-tuning on tagged reasoning chains (paper section 3.4, eq. 4; S22)."""
