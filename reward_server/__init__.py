"""The remote PRMU worker: an HTTP front with authentication and limits, and an engine behind it (S21)."""
