"""The cuda plane: steps that a GPU worker hands over layer by layer, without a message for each."""
