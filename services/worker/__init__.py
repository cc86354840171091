"""What the prefill and the decode worker have in common: from settings to a running, observable, drainable process."""
