"""Model runners with the interface of `diffulex.attention`: the module, its metadata, and the steps that these mean."""
