"""What the work reports of itself: logs, metric definitions, traces and errors; each off or on by its settings."""
