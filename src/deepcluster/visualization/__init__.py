"""See what was learned: filters, top images, and a page of the clusters. What computes returns arrays; saving is apart."""
