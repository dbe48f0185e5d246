"""Self-contained HTML pages: figures, tables and texts coloured by what the gates selected."""
