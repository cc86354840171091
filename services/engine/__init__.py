"""The engine: its port (`api`), its settings, and Tandem's own engine (`native`) behind the port."""
