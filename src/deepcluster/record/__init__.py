"""What a run folder knows, as its report takes it."""
