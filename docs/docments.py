"""Lets the reference show the comments that stand beside arguments and fields (nbdev's "docments")."""
import re
import griffe


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
        if text: func.docstring = griffe.Docstring(text.strip(), parent=func, lineno=node.lineno)

    def on_attribute_instance(self, *, node, attr, agent, **kw):
        if attr.docstring or not attr.parent.is_class: return
        said = comment(agent.filepath.read_text(encoding='utf-8').splitlines(), node.lineno)
        if said: attr.docstring = griffe.Docstring(said, parent=attr, lineno=node.lineno)
