"""The laboratory: the demonstration, and the comparison of the field's losses."""
