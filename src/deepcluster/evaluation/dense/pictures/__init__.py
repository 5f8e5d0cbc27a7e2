"""Pictures of predictions beside truth."""
