"""A frozen trunk at work: what evaluation and visualization share."""
