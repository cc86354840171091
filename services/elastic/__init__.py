"""The elastic worker: prefills and decodes over one engine, one pool and one exchange. The only one that knows both."""
