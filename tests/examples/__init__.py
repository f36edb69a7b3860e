"""The examples as scripts. A package with a file, for some other packages install a folder of this name."""
