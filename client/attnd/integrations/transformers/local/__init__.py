"""What stays here of a model whose layers do not all attend: the states of convolutions and recurrences."""
