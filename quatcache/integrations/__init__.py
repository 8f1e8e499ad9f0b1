"""The cache inside other people's frameworks: one module for each, thin, and imported only by whoever uses it.

Each needs the package that it is named after; without it, the error names the extra to install.
"""
