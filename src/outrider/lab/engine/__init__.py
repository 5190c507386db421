"""The embedded engine: a small, real CPU engine for laptops and tests. Not the product."""
