"""Self-contained HTML pages: charts as inline SVG, tagged text, one style sheet; no script, nothing from elsewhere."""
