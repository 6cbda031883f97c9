"""The wire format of messages. How does a message become bytes, and who understands which version?"""
