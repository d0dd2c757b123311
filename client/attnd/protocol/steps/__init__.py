"""Parts of a step: lengths, page tables, layer groups. `attnd.protocol.step_metadata` puts them together."""
