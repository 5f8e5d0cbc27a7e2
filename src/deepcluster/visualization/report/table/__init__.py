"""Tables of embeddings or of clusters, of any program, as a report takes them."""
