"""Model runners with the interface of `diffulex.attention`: the module, its metadata, and the steps that these mean.

`install()` puts them in the place of Diffulex's own.
"""

from attnd.integrations.diffulex.installation import Installation, install

__all__ = ["Installation", "install"]
