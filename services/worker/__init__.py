"""Holds what prefill and decode workers share: from settings to a running, observable, drainable process."""
