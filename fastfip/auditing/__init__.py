"""Signs of a backdoor that an owner without the trigger can find."""
