"""The only files that touch private attributes of Lightning, one concern a file."""
