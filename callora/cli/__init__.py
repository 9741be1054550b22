"""The commands. Each parses its arguments, builds what it needs and calls; nothing is decided here.

`main` puts them together, `running` and `database` are what they share; the rest are the commands, a noun each.
"""
