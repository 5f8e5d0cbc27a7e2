"""How the method works, shown with the images and the networks of a run."""
