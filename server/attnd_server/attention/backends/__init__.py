"""Ways of computing attention, each with the same small interface (`base.AttentionKernel`)."""
