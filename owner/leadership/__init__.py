"""Which owner leads, for how long, and what does it do while it leads?"""
