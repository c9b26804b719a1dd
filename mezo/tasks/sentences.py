"""The small changes that let a stored sentence stand inside a longer one."""


def without_stop(sentence: str) -> str:
    """The sentence without the mark that ends it.

    >>> without_stop("The film was good. "), without_stop("Was it"), without_stop("It cost 3.5!")
    ('The film was good', 'Was it', 'It cost 3.5')
    """
    sentence = sentence.strip()
    return sentence[:-1].rstrip() if sentence.endswith((".", "?", "!")) else sentence


def lower_first(sentence: str) -> str:
    """The sentence with its first letter in lower case.

    >>> lower_first("The film was good.")
    'the film was good.'
    """
    sentence = sentence.strip()
    return sentence[:1].lower() + sentence[1:]


def upper_first(sentence: str) -> str:
    """The sentence with its first letter in upper case.

    >>> upper_first("is it good")
    'Is it good'
    """
    sentence = sentence.strip()
    return sentence[:1].upper() + sentence[1:]
