"""The model and the data that the package ships, so that every command works with nothing else given."""
