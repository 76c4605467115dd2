"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """Bad input: the message is one line that names the flag or file and says how to mend it.

    Command lines print it without a traceback and exit with code 2.
    """
