"""The command lines of the 2018 release: its flags, defaults, files and printed lines, on today's engine."""
