"""The images that excite a filter most: `search` finds them, `pages` draws them, `saving` writes the files."""
