raise ImportError("this torch is to be looked at, not imported")
