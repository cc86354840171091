"""`tandem size`: computes what a deployment needs of memory, network and index."""
