"""Stands in for Diffulex: the modules and names that attnd looks for in it, and a runner that uses them as its do."""
