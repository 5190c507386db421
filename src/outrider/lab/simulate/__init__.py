"""`outrider simulate`: a trace, the real policies, modelled engines and links, on the virtual clock."""
