"""Lets the reference show the comments that stand beside arguments and fields (nbdev's "docments")."""
import re
import griffe


OPTIONS = {'parser': 'google', 'parser_options': {'warn_missing_types': False, 'returns_named_value': False}}


def comment(lines: list, number: int) -> str:
    found = re.search(r'\s#\s+(.+)$', lines[number - 1])
    return found[1] if found else ''


class Docments(griffe.Extension):
    def on_function_instance(self, *, node, func, agent, **kw):
        lines = agent.filepath.read_text(encoding='utf-8').splitlines()
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        if node.args.vararg: arguments.append(node.args.vararg)
        if node.args.kwarg: arguments.append(node.args.kwarg)
        alone = {a.lineno: a.arg for a in arguments if a.lineno != node.lineno}     # a line's comment is about its last argument
        about = [f'    {name}: {said}' for line, name in alone.items() if (said := comment(lines, line))]
        returned = comment(lines, node.returns.lineno) if node.returns else ''
        text = func.docstring.value if func.docstring else ''
        if about: text += '\n\nArgs:\n' + '\n'.join(about)
        if returned: text += f'\n\nReturns:\n    {returned}'
        if text: func.docstring = griffe.Docstring(text.strip(), parent=func, lineno=node.lineno, **OPTIONS)

    def on_class_members(self, *, node, cls, agent, **kw):
        "The fields of a class are a table, not a heading each."
        lines = agent.filepath.read_text(encoding='utf-8').splitlines()
        fields = [a for a in cls.members.values() if a.is_attribute]
        rows = []
        for a in fields:
            kind = f' ({a.annotation})' if a.annotation else ''
            default = f'default `{a.value}`' if a.value else ''
            rows.append(f'    {a.name}{kind}: {"; ".join(filter(None, [comment(lines, a.lineno), default]))}')
        for a in fields: cls.del_member(a.name)
        if not rows: return
        text = (cls.docstring.value if cls.docstring else '') + '\n\nAttributes:\n' + '\n'.join(rows)
        cls.docstring = griffe.Docstring(text.strip(), parent=cls, lineno=node.lineno, **OPTIONS)
