"""The words and rules of the field, without any I/O: leads and their states, campaigns, phone numbers, calls."""
