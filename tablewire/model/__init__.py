"""Values without I/O that both services share. What are a span, a checkpoint, a message?"""
