"""MiniLaMP: SYNTHETIC users with hidden preferences, written in LaMP's own file format."""
