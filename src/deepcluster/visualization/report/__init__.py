"""One HTML page of a run or of a table of embeddings: a module a section, `page` puts them together."""
